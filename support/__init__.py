"""What training scripts share: run directories, seeds trained together, tables and figures of results."""
