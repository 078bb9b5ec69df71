//go:build integration

package tensordb_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/redistest"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// replicaOf starts a replica with the module.
func replicaOf(t *testing.T, s *redistest.Server) *redistest.Server {
	host, port, err := net.SplitHostPort(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	return redistest.WithModule(t, "--replicaof", host+" "+port, "--repl-diskless-sync-delay", "0")
}

// field returns a number of INFO, -1 where it has none.
func field(s *redistest.Server, name string) int64 {
	for line := range strings.Lines(string(s.Do("INFO", "everything").Bytes)) {
		if text, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			if err != nil {
				return -1
			}
			return n
		}
	}
	return -1
}

// caughtUp waits until a replica has all that its master sent.
func caughtUp(t *testing.T, master, replica *redistest.Server) {
	t.Helper()
	until := time.Now().Add(time.Minute)
	for {
		r := replica.Do("INFO", "replication")
		if strings.Contains(string(r.Bytes), "master_link_status:up") && field(replica, "slave_repl_offset") >= field(master, "master_repl_offset") {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("the replica does not catch up: %s", r.Bytes)
		}
		time.Sleep(10 * time.Millisecond) // Redis tells nobody
	}
}

// sameDigest compares the values of keys on two servers.
func sameDigest(t *testing.T, a, b *redistest.Server, keys []string) {
	t.Helper()
	args := []any{"DEBUG", "DIGEST-VALUE"}
	for _, key := range keys {
		args = append(args, key)
	}
	x, y := a.Do(args...), b.Do(args...)
	for i := range keys {
		if string(x.Elems[i].Bytes) != string(y.Elems[i].Bytes) {
			t.Errorf("%s has the digest %s on the master, %s on the replica", keys[i], x.Elems[i].Bytes, y.Elems[i].Bytes)
		}
	}
}

// trainer trains on a server and knows what must be there.
type trainer struct {
	t       *testing.T
	server  *redistest.Server
	conn    *resp.Conn
	prefix  string
	rng     *rand.Rand
	config  optim.Config
	params  []float32 // after acked
	state   []float32
	acked   int       // steps that were answered
	flight  []float32 // gradient of a step that may have been taken, nil for none
	replies int
}

const trained = 20_000 // floats: enough for memory to be used again

func newTrainer(t *testing.T, s *redistest.Server, i int) *trainer {
	c := &trainer{t: t, server: s, prefix: fmt.Sprintf("{job:%d}:", i), rng: rand.New(rand.NewPCG(uint64(i), 9)), config: optim.Config{Name: optim.Adam, LR: 0.01}}
	c.params, c.state = make([]float32, trained), make([]float32, 2*trained)
	return c
}

func (c *trainer) keys() []string { return []string{c.prefix + "p", c.prefix + "s"} }

// do sends a command. false: the server is gone.
func (c *trainer) do(args ...any) (resp.Reply, bool) {
	r, err := c.conn.Do(context.Background(), args...)
	var refused *resp.Error
	if errors.As(err, &refused) {
		c.t.Errorf("%s %v: %v", c.prefix, args[0], err)
		return r, false
	}
	if err == nil {
		c.replies++
	}
	return r, err == nil
}

func (c *trainer) random() []float32 {
	v := make([]float32, trained)
	for i := range v {
		v[i] = c.rng.Float32() - 0.5
	}
	return v
}

// step trains one step on the mean of two gradients, of which one comes by an
// accumulator. false: the server is gone.
func (c *trainer) step() bool {
	acc := c.prefix + "acc"
	a, b := c.random(), c.random()
	if _, ok := c.do("TENSOR.ACCUMULATOR", acc, trained, 2, 2); !ok {
		return false
	}
	for _, i := range []int{1, 0} {
		if _, ok := c.do("TENSOR.ACCUMULATE", acc, i, tensor.Bytes([][]float32{a, b}[i])); !ok {
			return false
		}
	}
	for _, command := range [][]any{
		{"TENSOR.AVERAGE", c.prefix + "g", acc}, {"TENSOR.DEL", acc}, {"TENSOR.SET", c.prefix + "h", "float32", 1, trained, tensor.Bytes(b)},
		{"TENSOR.MEAN", c.prefix + "m", c.prefix + "g", c.prefix + "h"}, {"TENSOR.NORM", c.prefix + "m"}, {"TENSOR.COPY", c.prefix + "k", c.prefix + "p"},
		{"TENSOR.RENAME", c.prefix + "l", c.prefix + "k"}, {"TENSOR.MEDIAN", c.prefix + "k", c.prefix + "g", c.prefix + "h", c.prefix + "m"},
	} {
		if _, ok := c.do(command...); !ok {
			return false
		}
	}
	gradient := make([]float32, trained)
	for i := range gradient {
		average := (a[i] + b[i]) / 2
		gradient[i] = (average + b[i]) / 2
	}
	c.flight = gradient
	args := []any{"TENSOR.UPDATE", c.prefix + "p", c.prefix + "s", c.prefix + "m", "STEP", c.acked + 1}
	for _, word := range c.config.Args() {
		args = append(args, word)
	}
	r, ok := c.do(args...)
	if !ok {
		return false
	}
	if r.Int != 1 {
		c.t.Errorf("%s: step %d answers %d", c.prefix, c.acked+1, r.Int)
	}
	c.take()
	return true
}

// take takes the step in flight here too.
func (c *trainer) take() {
	c.acked++
	c.config.Step(c.params, c.state, c.params, c.state, c.flight, uint64(c.acked))
	c.flight = nil
}

// verify finds what was answered, and at most the step in flight beyond it.
func (c *trainer) verify() bool {
	if c.acked == 0 && c.flight == nil {
		_, ok := c.do("TENSOR.SET", c.prefix+"p", "float32", 1, trained, tensor.Bytes(c.params))
		return ok
	}
	steps := 0
	r, err := c.conn.Do(context.Background(), "TENSOR.META", c.prefix+"s")
	var refused *resp.Error
	switch {
	case err == nil:
		steps = int(r.Elems[7].Int)
	case !errors.As(err, &refused):
		return false
	case refused.Code != "NOKEY":
		c.t.Errorf("%s: %v", c.prefix, err)
	}
	switch {
	case steps == c.acked+1 && c.flight != nil:
		c.take()
	case steps != c.acked:
		c.t.Errorf("%s: the server is at step %d, it had answered step %d", c.prefix, steps, c.acked)
	}
	r, ok := c.do("TENSOR.HASH", c.prefix+"p")
	if ok && string(r.Bytes) != treehash.Sum(tensor.Bytes(c.params)).String() {
		c.t.Errorf("%s: the parameters after step %d are not those that were trained", c.prefix, steps)
	}
	return ok
}

// connect waits for a server that was killed.
func (c *trainer) connect(stop *atomic.Bool) bool {
	for !stop.Load() {
		conn, err := resp.Dial(context.Background(), "unix", c.server.Socket, resp.DialOptions{Timeout: time.Minute})
		if err == nil {
			if _, err = conn.Do(context.Background(), "PING"); err == nil {
				c.conn = conn
				return true
			}
			conn.Close()
		}
		time.Sleep(10 * time.Millisecond) // it tells nobody when it is there again
	}
	return false
}

// TestStress trains with many clients on one server, which saves, rewrites its
// file, has a replica and is killed all the while. Each client knows to the bit
// what must be there. STRESS_MINUTES says how long; default one minute.
func TestStress(t *testing.T) {
	minutes := 1.0
	if text := os.Getenv("STRESS_MINUTES"); text != "" {
		var err error
		if minutes, err = strconv.ParseFloat(text, 64); err != nil {
			t.Fatal(err)
		}
	}
	master := redistest.WithModule(t, "--appendonly", "yes", "--appendfsync", "always")
	replica := replicaOf(t, master)
	var stop atomic.Bool
	var pause sync.RWMutex // held while nobody may write
	var wg sync.WaitGroup
	var trainers []*trainer
	for i := range 32 {
		c := newTrainer(t, master, i)
		trainers = append(trainers, c)
		wg.Add(1)
		go func() {
			defer wg.Done()
			for !stop.Load() {
				if !c.connect(&stop) {
					return
				}
				for ok := c.verify(); ok && !stop.Load(); {
					pause.RLock()
					ok = c.step()
					pause.RUnlock()
				}
				c.conn.Close()
			}
		}()
	}
	var keys []string
	for _, c := range trainers {
		keys = append(keys, c.keys()...)
	}
	end := time.Now().Add(time.Duration(minutes * float64(time.Minute)))
	kills, saves, rewrites, digests := 0, 0, 0, 0
	var sizes []int64
	for round := 0; time.Now().Before(end) && !t.Failed(); round++ {
		time.Sleep(1500 * time.Millisecond) // of training
		conn := master.Dial()
		switch round % 4 {
		case 0:
			if _, err := conn.Do(context.Background(), "BGSAVE", "SCHEDULE"); err == nil {
				saves++
			}
		case 1:
			if _, err := conn.Do(context.Background(), "BGREWRITEAOF"); err == nil {
				rewrites++
			}
		case 2:
			pause.Lock()
			caughtUp(t, master, replica)
			sameDigest(t, master, replica, keys)
			sizes = append(sizes, field(master, "used_memory"))
			digests++
			pause.Unlock()
		case 3:
			master.Kill()
			master.Run()
			kills++
		}
		conn.Close()
	}
	stop.Store(true)
	wg.Wait()
	steps, replies := 0, 0
	for _, c := range trainers {
		steps, replies = steps+c.acked, replies+c.replies
		if !c.connect(new(atomic.Bool)) || !c.verify() {
			t.Errorf("%s: the server is gone", c.prefix)
		}
		c.conn.Close()
	}
	caughtUp(t, master, replica)
	sameDigest(t, master, replica, keys)
	if log := master.Log(); strings.Contains(log, "failed badly") || strings.Contains(log, "CRITICAL") {
		t.Error("the server's log tells of a fault")
	}
	if log := replica.Log(); strings.Contains(log, "CRITICAL") {
		t.Errorf("the replica's log tells of a fault:\n%s", log)
	}
	if len(sizes) > 2 && slices.Max(sizes) > 4*sizes[0]+256<<20 {
		t.Errorf("the server's memory grows: %v bytes", sizes)
	}
	t.Logf("32 clients took %d steps with %d commands in %.1f minutes: %d kills with a restart, %d saves, %d rewrites, %d equal digests of the replica; memory %v",
		steps, replies, minutes, kills, saves, rewrites, digests, sizes)
}
