"""What passwords are sealed with: the keyring, data keys, and where keys are kept."""
