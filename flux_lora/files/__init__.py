"""What leaves the house: image files with the record of what drew them, and how to draw them again."""
