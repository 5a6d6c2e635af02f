"""What was paid for: a journal of queries and answers, and the budget."""
