"""What joins the optimizers to their hosts. A host is imported when it is used; nothing else imports this."""
