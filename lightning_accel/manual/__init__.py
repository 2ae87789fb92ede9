"""The manual loop, with the verbs that Accelerate's users know."""
