"""Plants faults in the user's own engine and model, and says which of them a check catches."""
