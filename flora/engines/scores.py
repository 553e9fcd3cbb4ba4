"""What is evaluated beside loss and accuracy."""


class Scores:
    def of_clients(self, model, views):
        return {}

    def of_server(self, model):
        return {}
