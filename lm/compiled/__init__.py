"""A compiled program read for absent chips: instructions, memory, traffic, costs and step time."""
