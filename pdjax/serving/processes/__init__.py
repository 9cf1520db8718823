"""HTTP in processes of its own: fronts beside the process of the engines.

The engines' process has the `AsyncLLM`, the listening socket and `Fronts`, which starts the fronts
and restarts one that dies. A front has the endpoints, the tokenizer and TLS; its backend is a
`RemoteBackend`. Two socketpairs join the two: frames of messages on one, connections that the
`Dealer` has accepted on the other.

    client -> Dealer -> FrontServer -> endpoints -> RemoteBackend -> Asked  -> FrontLink -> session
    client <- FrontServer <- endpoints <- RemoteAnswer <- News, once a turn <- Outbox <- session

Tokens cross, and text is made in the fronts: a front that finds a stop string says how many tokens
lead up to it (`StopFound`), and the engines drop what they have made meanwhile.
"""
