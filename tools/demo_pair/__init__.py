"""Training and writing of the demo pair: tokenizer, target, drafters and their files. Needs torch."""
