"""Rules between the fields of a run, one module per subject; `checks` applies them."""
