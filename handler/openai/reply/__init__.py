"""What a model's reply says: its reasoning, its content, and the tools that it calls.

Models write all of it into one text, each family in its own way. The readers here take that text in
pieces of any size and say the same whatever the pieces are.
"""
