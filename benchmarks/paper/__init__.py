"""The paper's numbers and claims beside the results of `d2f eval`."""
