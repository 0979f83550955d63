"""The rules, one file for each kind of promise; `strategies.conformance.RULES` has them in order."""
