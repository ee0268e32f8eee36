"""halfulp in other people's training loops."""
