package gradient

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spirt-ml/spirt/function"
)

// killer stands between instances and database and kills instances at the worst moments.
type killer struct {
	database string
	listener net.Listener
	wg       sync.WaitGroup

	mu       sync.Mutex
	requests int // gradients that began to arrive
	replies  int // gradients that the database has taken in
	midway   int // instances killed while they sent a gradient
	after    int // instances killed when their gradient was in the sum and they did not know it
	ended    bool
	conns    map[net.Conn]struct{}
}

func newKiller(t *testing.T, database string) *killer {
	listener, err := net.Listen("unix", database+".proxy")
	check(t, err)
	k := &killer{database: database, listener: listener, conns: map[net.Conn]struct{}{}}
	k.wg.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			k.wg.Go(func() { k.relay(t, c.(*net.UnixConn)) })
		}
	})
	t.Cleanup(k.close)
	return k
}

func (k *killer) close() {
	k.listener.Close()
	k.mu.Lock()
	k.ended = true
	for c := range k.conns {
		c.Close()
	}
	k.mu.Unlock()
	k.wg.Wait()
}

// keep has close end a connection.
func (k *killer) keep(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.conns[c] = struct{}{}
	return !k.ended
}

func (k *killer) relay(t *testing.T, instance *net.UnixConn) {
	defer instance.Close()
	database, err := net.Dial("unix", k.database)
	if err != nil {
		t.Error(err)
		return
	}
	defer database.Close()
	if !k.keep(instance) || !k.keep(database) {
		return
	}
	raw, err := instance.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	pid := 0
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if pid == 0 {
		t.Error("no process behind a connection")
		return
	}
	var replies sync.WaitGroup
	replies.Go(func() {
		defer instance.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := database.Read(buf)
			if bytes.HasPrefix(buf[:n], []byte("+COUNTED")) || bytes.HasPrefix(buf[:n], []byte("+BUFFERED")) {
				k.mu.Lock()
				k.replies++
				kill := k.replies%5 == 0
				if kill {
					k.after++
				}
				k.mu.Unlock()
				if kill {
					unix.Kill(pid, unix.SIGKILL)
					return
				}
			}
			if _, err := instance.Write(buf[:n]); err != nil {
				return
			}
			if err != nil {
				return
			}
		}
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := instance.Read(buf)
		if bytes.Contains(buf[:n], []byte("TENSOR.ACCUMULATE")) {
			k.mu.Lock()
			k.requests++
			kill := k.requests%7 == 0
			if kill {
				k.midway++
			}
			k.mu.Unlock()
			if kill {
				database.Write(buf[:n*2/3])
				unix.Kill(pid, unix.SIGKILL)
				break
			}
		}
		if _, err := database.Write(buf[:n]); err != nil {
			break
		}
		if err != nil {
			break
		}
	}
	database.Close()
	replies.Wait()
}

// However instances are killed, every gradient is in the sum exactly once.
func TestKilledInstances(t *testing.T) {
	const (
		minibatches = 100
		concurrency = 4
		batch       = 16
	)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	p := newPeer(t, "logistic")
	k := newKiller(t, p.socket)
	p.event.Database.Address = p.socket + ".proxy"
	check(t, p.db.Accumulator(prefix+"gradient", len(p.params), minibatches, minibatches))

	var attempts, successes atomic.Int64
	strike := make(chan struct{}, 1000)
	platform, err := function.New(function.Config{
		Name: "gradient", Command: []string{function.Self()}, Env: []string{tokenVariable + "=" + secret},
		Isolation: function.Isolation{Sockets: []string{p.event.Database.Address}}, Concurrency: concurrency, Retries: 100, RetryBase: time.Millisecond, RetryMax: 20 * time.Millisecond,
		OnInvocation: func(i function.Invocation) {
			attempts.Add(1)
			if i.Error == "" {
				successes.Add(1)
			}
			strike <- struct{}{}
		},
	})
	check(t, err)
	defer platform.Close()

	// A second killer takes any instance in any state, at every fourth end of an attempt.
	stop := make(chan struct{})
	var killing sync.WaitGroup
	anywhere := 0
	killing.Go(func() {
		random := rand.New(rand.NewPCG(seed, 0))
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			case <-strike:
			}
			if list := platform.Instances(); n%4 == 0 && len(list) > 0 {
				if pid := list[random.IntN(len(list))].PID; pid != 0 && unix.Kill(pid, unix.SIGKILL) == nil {
					anywhere++
				}
			}
		}
	})

	results := make([]Result, minibatches)
	var wg sync.WaitGroup
	var retried atomic.Int64
	for i := range minibatches {
		wg.Go(func() {
			payload, err := json.Marshal(p.gradient(i, batch))
			if err != nil {
				t.Error(err)
				return
			}
			body, inv, err := platform.Invoke(t.Context(), payload)
			if err == nil {
				err = json.Unmarshal(body, &results[i])
			}
			if err != nil {
				t.Errorf("minibatch %d: %v", i, err)
			}
			if inv.Attempt > 1 {
				retried.Add(1)
			}
		})
	}
	wg.Wait()
	close(stop)
	killing.Wait()

	counted, err := p.db.Average(prefix+"average", prefix+"gradient")
	check(t, err)
	if counted != minibatches {
		t.Errorf("%d gradients are in the sum, want %d", counted, minibatches)
	}
	// The same minibatches without functions, in another sum of the same kind, and in one of float64.
	check(t, p.db.Accumulator(prefix+"reference", len(p.params), minibatches, 1))
	exact := make([]float64, len(p.params))
	for i := range minibatches {
		loss, correct, gradient := p.reference(rows(i, batch))
		if results[i].Loss != loss || results[i].Correct != correct || results[i].Samples != batch {
			t.Errorf("minibatch %d: %+v, want loss %v, correct %d", i, results[i], loss, correct)
		}
		_, err := p.db.Accumulate(prefix+"reference", i, gradient)
		check(t, err)
		for j, g := range gradient {
			exact[j] += float64(g)
		}
	}
	_, err = p.db.Average(prefix+"reference average", prefix+"reference")
	check(t, err)
	got := p.floats(t, prefix+"average")
	if !slices.Equal(got, p.floats(t, prefix+"reference average")) {
		t.Error("the average has other bits than that of the same gradients without functions")
	}
	for j := range exact {
		if want := exact[j] / minibatches; math.Abs(float64(got[j])-want) > 1e-5*(1+math.Abs(want)) {
			t.Fatalf("average[%d] is %v, want %v", j, got[j], want)
		}
	}

	duplicates := 0
	for _, r := range results {
		if r.Status == "duplicate" {
			duplicates++
		}
	}
	stats := platform.Stats()
	t.Logf("%d killed while sending, %d after their gradient was counted, %d anywhere; %d minibatches retried, %d told duplicate; %+v",
		k.midway, k.after, anywhere, retried.Load(), duplicates, stats)
	if k.midway == 0 || k.after == 0 || duplicates == 0 || retried.Load() == 0 {
		t.Error("the test has not killed what it should")
	}
	if duplicates < k.after {
		t.Errorf("%d instances were killed with their gradient counted, but only %d retries were told so", k.after, duplicates)
	}
	if n := attempts.Load(); n != int64(stats.Invocations) || n != minibatches+int64(stats.Retries) || successes.Load() != minibatches {
		t.Errorf("metered %d attempts, %d of them successes, stats %+v", n, successes.Load(), stats)
	}
}

// A minibatch that failed for good is left out of the sum and of what it is divided by.
func TestFailedMinibatchIsNotCounted(t *testing.T) {
	p := newPeer(t, "logistic")
	check(t, p.db.Accumulator(prefix+"gradient", len(p.params), 3, 3))
	platform, err := function.New(function.Config{
		Name: "gradient", Command: []string{function.Self()}, Env: []string{tokenVariable + "=" + secret}, Concurrency: 2,
		Isolation: function.Isolation{Sockets: []string{p.socket}},
	})
	check(t, err)
	defer platform.Close()
	want := make([]float32, len(p.params))
	for i := range 3 {
		e := p.gradient(i, 8)
		if i == 1 {
			e.Rows[0] = samples // there is no such row
		}
		payload, err := json.Marshal(e)
		check(t, err)
		_, inv, err := platform.Invoke(t.Context(), payload)
		if i == 1 {
			if err == nil || inv.Error != Refused || inv.Attempt != 1 {
				t.Fatalf("%+v, %v", inv, err)
			}
			check(t, p.db.Skip(prefix+"gradient", i))
			continue
		}
		check(t, err)
		_, _, g := p.reference(e.Rows)
		for j := range want {
			want[j] += g[j] / 2
		}
	}
	counted, err := p.db.Average(prefix+"average", prefix+"gradient")
	check(t, err)
	got := p.floats(t, prefix+"average")
	for j := range want {
		if counted != 2 || math.Abs(float64(got[j]-want[j])) > 1e-6 {
			t.Fatalf("average[%d] of %d is %v, want %v", j, counted, got[j], want[j])
		}
	}
}
