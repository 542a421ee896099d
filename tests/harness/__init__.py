"""What tests are built with: engines, ranks, references and runs of the command line."""
