"""From documents to ids: what is read, by one process or several, and how it is encoded."""
