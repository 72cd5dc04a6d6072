"""What several records say together: steps in their history, and whether one lies in another's band."""
