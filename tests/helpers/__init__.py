"""What several tests share: tiny models, trainers over them, a local Hub."""
