"""What the trainers over several datasets are given: their datasets and models, and what they refuse of them."""
