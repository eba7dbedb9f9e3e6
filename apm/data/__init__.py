"""Images, teacher features and test sets: what models are given."""
