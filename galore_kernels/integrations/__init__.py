"""What joins the optimizers to their hosts. Each host is imported when it is used; nothing here is imported by the rest."""
