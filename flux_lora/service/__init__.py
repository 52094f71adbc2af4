"""What faces callers who are not trusted."""
