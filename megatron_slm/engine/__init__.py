"""DeepSpeed's engines and ours."""
