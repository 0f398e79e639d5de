"""What each size of a model costs a task, measured on the user's own examples."""
