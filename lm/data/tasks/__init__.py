"""Small tasks with one right answer, and how an answer is scored."""
