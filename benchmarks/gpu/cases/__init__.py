"""The cases of the report, one module per stage; `catalogue` lists them."""
