"""What training would allocate and send, before anybody runs it."""
