"""What a speed is made of, told: how drafts fare, how far the best is, and one step drawn."""
