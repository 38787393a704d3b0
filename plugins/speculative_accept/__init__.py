"""Which of the draft's tokens stand, and which token comes after them."""
