"""Applications of many calls: their graphs, the clients that carry them out, the engines below, and what was seen."""
