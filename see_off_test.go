package spirt

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensor"
)

// Who has finished stays while another fetches a state from it, and only then.
func TestSeeOff(t *testing.T) {
	t.Parallel()
	job := smallJob(1)
	job.Peers, job.Model = 2, "cnn" // a state of some MB, for which a peer stays long enough
	dir := runOf(t, job)
	open := func(n int) *peer {
		p, err := openPeer(PeerConfig{Run: dir, Peer: n, Executable: os.Args[0]})
		check(t, err)
		t.Cleanup(func() { check(t, p.close()) })
		return p
	}
	p, o := open(1), open(2)
	params := tensor.Bytes(make([]float32, p.store.params))
	hash, _, err := p.store.putState(params, tensor.Bytes(make([]float32, p.store.state)), 1)
	check(t, err)
	p.seeOff(t.Context()) // nobody is connected
	check(t, o.host.SetAddresses(0, p.host.Addrs()))
	for e := range o.host.Events() {
		if _, ok := e.(p2p.Connected); ok {
			break
		}
	}
	fetch := func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := o.host.Fetch(ctx, hash, int64(len(params)), []int{0}); err != nil {
			t.Fatal(err)
		}
	}
	p.seeOff(t.Context()) // nobody has fetched
	fetch()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.seeOff(t.Context())
	}()
	for range 10 {
		fetch()
		select {
		case <-ended:
			t.Fatal("it left while another fetched")
		default:
		}
	}
	<-ended
}
