"""What is done for speed, and nothing that changes what a picture shows beyond what its profile says."""
