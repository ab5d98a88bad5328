"""What a step costs on machines that are not at hand: counted, fitted here, and predicted."""
