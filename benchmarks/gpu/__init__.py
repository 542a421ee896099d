"""What proves a GPU: cases that each check or measure one thing, and the report that runs them."""
