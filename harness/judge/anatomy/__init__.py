"""What a speed is made of: how drafts were accepted, and what a better draft or a cheaper step would give."""
