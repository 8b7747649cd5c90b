"""What several tests share: small models and files, servers, and ways to break things."""
