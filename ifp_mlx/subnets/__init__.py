"""Sub-networks ready to answer: cached by task, kept on disk, sized before they are loaded."""
