"""The style sheet of the page: one column on a telephone, two on a desk; light and dark."""

STYLE = """
:root { --ink:#1d2430; --dim:#5f6b7c; --paper:#ffffff; --card:#f5f7fa; --line:#dde3ea;
  --a:#2563c9; --b:#d9730d; --c:#2f8f4e; --d:#b5348f; --e:#0e8f96; --f:#8a6d1d; }
@media (prefers-color-scheme: dark) { :root {
  --ink:#e4e9f0; --dim:#97a3b4; --paper:#12161c; --card:#1a2029; --line:#2c3542;
  --a:#6ea8ff; --b:#ffa04d; --c:#5fcf85; --d:#f07fcf; --e:#4fd0d8; --f:#dcb94f; } }
* { box-sizing:border-box }
body { margin:0 auto; padding:16px; max-width:1160px; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
h1 { font-size:1.5rem; margin:.4em 0; overflow-wrap:anywhere } h2 { font-size:1.1rem; margin:0 0 .6em }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px; margin:14px 0 }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr)); gap:14px }
figure { margin:0; min-width:0 } figcaption { font-weight:600; overflow-wrap:anywhere }
svg { width:100%; min-width:0; height:auto; display:block } svg text { fill:var(--dim); font-size:11px }
@media (max-width:480px) { body { padding:10px } section { padding:10px } svg text { font-size:16px } }
.grid { stroke:var(--line) } polyline { fill:none; stroke-width:1.8; stroke-linejoin:round }
.wide { overflow-x:auto } .note + .wide { margin-top:.8em }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums }
th,td { text-align:left; padding:4px 10px 4px 0; border-bottom:1px solid var(--line); vertical-align:top;
  overflow-wrap:break-word }
.bars { max-width:760px } .bars text { font-size:12px }
th { color:var(--dim); font-weight:600 } td:first-child { min-width:5.5em }
.note,.none { color:var(--dim); font-size:.88rem; margin:.6em 0 0 }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 16px; padding:0; margin:0 0 8px; font-size:.9rem }
.legend i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:6px; vertical-align:-1px }
polyline.s0,circle.s0 { stroke:var(--a) }
polyline.s1,circle.s1 { stroke:var(--b) }
polyline.s2,circle.s2 { stroke:var(--c) }
polyline.s3,circle.s3 { stroke:var(--d) }
polyline.s4,circle.s4 { stroke:var(--e) }
polyline.s5,circle.s5 { stroke:var(--f) }
i.s0 { background:var(--a) } i.s1 { background:var(--b) } i.s2 { background:var(--c) } i.s3 { background:var(--d) }
i.s4 { background:var(--e) } i.s5 { background:var(--f) }
i.p0 { background:var(--f) } rect.p0 { fill:var(--f) }
i.p1 { background:var(--a) } rect.p1 { fill:var(--a) }
i.p2 { background:var(--e) } rect.p2 { fill:var(--e) }
i.p3 { background:var(--c) } rect.p3 { fill:var(--c) }
i.p4 { background:#e05252 } rect.p4 { fill:#e05252 }
i.p5 { background:#888fe8 } rect.p5 { fill:#888fe8 }
i.p6 { background:#c98be0 } rect.p6 { fill:#c98be0 }
i.p7 { background:var(--b) } rect.p7 { fill:var(--b) }
i.p8 { background:var(--d) } rect.p8 { fill:var(--d) }
i.p9 { background:#7a8a99 } rect.p9 { fill:#7a8a99 }
i.p10 { background:var(--line) } rect.p10 { fill:var(--line) }
"""
