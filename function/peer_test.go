package function

func peerMain() {}
