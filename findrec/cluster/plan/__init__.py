"""Planning of workers and memory."""
