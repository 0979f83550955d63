"""FSDP on models of transformers: built small from their configurations, compared with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from accelerator import Accelerator
from rank_pool import RankPool
from strategies import CPU, FSDP, PrepareError

pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NAMES = ["gpt2", "llama", "t5", "bert", "vit"]


def make(name: str) -> nn.Module:
    import transformers as t

    t.logging.set_verbosity_error()
    if name == "gpt2":
        config: Any = t.GPT2Config(**SMALL, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return t.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **sizes, num_key_value_heads=1, max_position_embeddings=16))
    if name == "t5":
        config = t.T5Config(
            vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        return t.T5ForConditionalGeneration(config)
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=48, **sizes, max_position_embeddings=16))
    return t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))


class Samples(Dataset[Any]):
    """Thirteen samples: with windows of two batches of two per rank, the last window is short and uneven."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 48, (13, 8), generator=generator)
        if name == "vit":
            self.fields = {"pixel_values": torch.randn(13, 1, 8, 8, generator=generator)}
        else:
            self.fields = {"input_ids": tokens}
        self.fields["labels"] = tokens[:, 0] % 2 if name in ("bert", "vit") else tokens

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: field[index] for name, field in self.fields.items()}


def train(name: str, strategy: Any, folder: str | None = None, precision: Any = "no") -> dict[str, Any]:
    accelerator = Accelerator(strategy, split_batches=True, gradient_accumulation_steps=2, mixed_precision=precision)
    torch.manual_seed(0)
    with accelerator.init_module():
        net = make(name).eval()  # no dropout
    if isinstance(strategy, FSDP) and strategy.activation_checkpointing:
        for part in net.modules():
            if hasattr(part, "config"):
                part.config.use_cache = False
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(Samples(name), batch_size=4))
    losses, norms = [], []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                output = model(**batch)
                of_samples = output.loss.detach().float().expand(len(batch["labels"]))
                losses.append(accelerator.gather_for_metrics(of_samples).mean().item())
                accelerator.backward(output.loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if norm is not None:
                norms.append(norm.item())
    if folder is not None:
        accelerator.save_model(model, folder)
        net.config.save_pretrained(folder)
    text = str(accelerator.explain()["model 0 blocks"].got) if isinstance(strategy, FSDP) else ""
    weights = accelerator.get_state_dict(model)
    generated = None
    if name in ("gpt2", "t5"):
        start = torch.full((1, 3), 5)
        generated = model.generate(start, max_new_tokens=3, do_sample=False)
    accelerator.end_training()
    return {"losses": losses, "norms": norms, "weights": weights, "blocks": text, "generated": generated}


def train_all(names: list[str], strategy: Any, precision: Any = "no") -> dict[str, Any]:
    return {name: train(name, strategy, precision=precision) for name in names}


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> dict[str, Any]:
    return ranks(train_all, NAMES, CPU(), nproc=1, timeout=90)[0]  # type: ignore[no-any-return]


BLOCKS = {
    "gpt2": "2 x GPT2Block",
    "llama": "2 x LlamaDecoderLayer",
    "t5": "T5Block",
    "bert": "2 x BertLayer",
    "vit": "2 x ViTLayer",
}
SETTINGS = {
    "two": (FSDP(), 2),
    "four": (FSDP(), 4),
    "replicated": (FSDP(replicate=2), 4),
    "offload": (FSDP(cpu_offload=True, activation_checkpointing=True), 2),
}


def assert_near(got: dict[str, Any], expected: dict[str, Any], atol: float, rtol: float) -> None:
    for what in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(got[what]), torch.tensor(expected[what]), atol=atol, rtol=rtol)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_models_train_as_on_one_process(ranks: RankPool, expected: dict[str, Any], setting: str) -> None:
    strategy, nproc = SETTINGS[setting]
    for name, got in ranks(train_all, NAMES, strategy, nproc=nproc, timeout=90)[0].items():
        assert BLOCKS[name] in got["blocks"]
        assert_near(got, expected[name], atol=1e-6, rtol=1e-5)
        assert got["weights"].keys() == expected[name]["weights"].keys()
        for key, weight in expected[name]["weights"].items():
            torch.testing.assert_close(got["weights"][key], weight, atol=1e-6, rtol=1e-5)
        if expected[name]["generated"] is not None:
            assert torch.equal(got["generated"], expected[name]["generated"])


def checkpointed_with_a_cache() -> None:
    Accelerator(FSDP(activation_checkpointing=True)).prepare(make("gpt2"))


def test_a_cache_does_not_go_with_activation_checkpointing(ranks: RankPool) -> None:
    with pytest.raises(PrepareError, match=r"GPT2LMHeadModel twice.*use_cache = False.*model.config"):
        ranks(checkpointed_with_a_cache, nproc=2)


def test_models_train_in_bfloat16(ranks: RankPool, expected: dict[str, Any]) -> None:
    for name, got in ranks(train_all, NAMES, FSDP(), "bf16", nproc=2, timeout=90)[0].items():
        assert_near(got, expected[name], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_transformers_loads_what_save_model_wrote(ranks: RankPool, tmp_path: Path, name: str) -> None:
    import transformers as t

    weights = ranks(train, name, FSDP(), str(tmp_path), nproc=2, timeout=60)[0]["weights"]
    loaded = type(make(name)).from_pretrained(tmp_path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, weights[key])
    assert t.AutoConfig.from_pretrained(tmp_path).vocab_size == 48
