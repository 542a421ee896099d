"""What a ZeRO JSON may say: DeepSpeed's keys, and what other trainers make of them."""
