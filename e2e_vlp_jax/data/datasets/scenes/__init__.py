"""The drawn scenes: pictures (`draw`), truth (`facts`), language (`text`)."""
