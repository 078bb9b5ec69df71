//go:build integration

package tensordb_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/redistest"
	"github.com/spirt-ml/spirt/resp"
)

func TestConformanceRedis(t *testing.T) {
	s := redistest.WithModule(t)
	conforms(t, conform(t, s.Dial(), "{job:1}:"))
	if strings.Contains(s.Log(), "failed badly") {
		t.Error(s.Log())
	}
}

// A server whose strings are replaced, deleted and renamed by others meanwhile
// answers the same, whatever memory it uses again.
func TestConformanceRedisTwice(t *testing.T) {
	s := redistest.WithModule(t, "--appendonly", "yes", "--appendfsync", "no")
	first := conform(t, s.Dial(), "{job:1}:")
	s.Do("FLUSHALL", "ASYNC")
	conforms(t, first)
	conforms(t, conform(t, s.Dial(), "{job:1}:"))
	s.Do("FLUSHALL", "SYNC")
	conforms(t, conform(t, s.Dial(), "{job:2}:"))
}

// The program, in a process of its own.
func TestConformanceProcess(t *testing.T) {
	dir := t.TempDir()
	program, socket := filepath.Join(dir, "spirt"), filepath.Join(dir, "s")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/spirt-ml/spirt/cmd/spirt").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command(program, "db", "--listen", "unix:"+socket, "--dir", "none", "--open")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var conn *resp.Conn
	for until := time.Now().Add(30 * time.Second); conn == nil; {
		var err error
		if conn, err = resp.Dial(t.Context(), "unix", socket, resp.DialOptions{}); err != nil && time.Now().After(until) {
			t.Fatalf("%v\n%s", err, stderr.String())
		}
	}
	defer conn.Close()
	conforms(t, conform(t, conn, "{job:1}:"))
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("it ends with %v\n%s", err, stderr.String())
	}
}

// While one client has a long task done, another is answered at once. The
// figure is told, not judged.
func TestPing(t *testing.T) {
	s := redistest.WithModule(t)
	conn, other := s.Dial(), s.Dial()
	args := []any{"TENSOR.MEAN", "mean"}
	data := float32s(2_500_000, func(i int) float32 { return float32(i) })
	for range 24 {
		key := string(rune('a' + len(args)))
		if _, err := conn.Do(context.Background(), "TENSOR.SET", key, "float32", 1, len(data)/4, data); err != nil {
			t.Fatal(err)
		}
		args = append(args, key)
	}
	done := make(chan error, 1)
	go func() {
		var err error
		for i := 0; i < 20 && err == nil; i++ {
			_, err = conn.Do(context.Background(), args...)
		}
		done <- err
	}()
	var times []time.Duration
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(times)
			t.Logf("%d pings during 20 means of 24 x 2.5 M: p50 %v, p99 %v, max %v", len(times), times[len(times)/2], times[len(times)*99/100], times[len(times)-1])
			return
		default:
		}
		start := time.Now()
		if _, err := other.Do(context.Background(), "PING"); err != nil {
			t.Fatal(err)
		}
		times = append(times, time.Since(start))
	}
}

// What is done to a tensor reaches the file and the replica; what can be
// computed again does not.
func TestEffects(t *testing.T) {
	master := redistest.WithModule(t, "--appendonly", "yes", "--appendfsync", "always", "--aof-use-rdb-preamble", "no")
	replica := replicaOf(t, master)
	caughtUp(t, master, replica) // what is copied at first is all that there is
	x := float32s(30_000, func(i int) float32 { return float32(i) })
	for _, command := range [][]any{
		{"TENSOR.SET", "p", "float32", 1, 30_000, x},
		{"TENSOR.SCALE", "q", "2", "p"},
		{"TENSOR.ACCUMULATOR", "acc", 30_000, 1, 1},
		{"TENSOR.ACCUMULATE", "acc", 0, x},
		{"TENSOR.AVERAGE", "g", "acc"},
		{"TENSOR.UPDATE", "p", "s", "g", "STEP", 1, "SGD", "LR", "0.5", "MOMENTUM", "0.9"},
		{"TENSOR.COPY", "r", "q"}, {"TENSOR.RENAME", "moved", "r"}, {"TENSOR.STEP", "moved", 9},
		{"TENSOR.AVERAGE", "kept", "acc"}, {"TENSOR.KIND", "kept", "PARAMETER"},
		{"TENSOR.AVERAGE", "other", "acc"}, {"TENSOR.RENAME", "another", "other"},
		{"TENSOR.AVERAGE", "lives", "acc"}, {"PEXPIRE", "lives", 3_600_000}, {"TENSOR.KIND", "lives", "PARAMETER"},
		{"TENSOR.COPY", "was", "p"}, {"TENSOR.AVERAGE", "was", "acc"}, {"TENSOR.COPY", "made", "p"}, {"TENSOR.KIND", "made", "GRADIENT"},
		{"TENSOR.SET", "gone", "uint8", 1, 1, "x"}, {"TENSOR.DEL", "gone"}, {"PEXPIRE", "q", 3_600_000},
	} {
		master.Do(command...)
	}
	// Within a transaction.
	conn := master.Dial()
	for _, command := range [][]any{{"MULTI"}, {"TENSOR.SCALE", "t", "3", "q"}, {"TENSOR.SCALE", "t", "5", "q"}, {"EXEC"}} {
		if _, err := conn.Do(context.Background(), command...); err != nil {
			t.Fatal(err)
		}
	}
	master.Do("EVAL", "return redis.call('TENSOR.SCALE', KEYS[1], 7, KEYS[2])", 2, "u", "q")
	caughtUp(t, master, replica)
	kept, gradients := []string{"p", "q", "s", "moved", "kept", "t", "u", "lives"}, []string{"g", "another", "was", "made"}
	sameDigest(t, master, replica, kept)
	for _, key := range gradients {
		if n := replica.Do("EXISTS", key).Int; n != 0 {
			t.Errorf("the replica has %q", key)
		}
	}
	before := map[string]string{}
	for _, key := range kept {
		before[key] = string(master.Do("TENSOR.HASH", key).Bytes)
	}
	for _, again := range []string{"the file", "the rewritten file"} {
		master.Kill()
		master.Run()
		for _, key := range kept {
			if got := string(master.Do("TENSOR.HASH", key).Bytes); got != before[key] {
				t.Errorf("from %s %q has the hash %s, it had %s", again, key, got, before[key])
			}
		}
		for _, key := range gradients {
			if n := master.Do("EXISTS", key).Int; n != 0 {
				t.Errorf("%q is in %s", key, again)
			}
		}
		if step := master.Do("TENSOR.META", "moved").Elems[7].Int; step != 9 {
			t.Errorf("from %s the step is %d", again, step)
		}
		for _, key := range []string{"q", "lives"} {
			if ttl := master.Do("TTL", key).Int; ttl < 3500 || ttl > 3600 {
				t.Errorf("from %s %s lives for %d s", again, key, ttl)
			}
		}
		if r := master.Do("TENSOR.UPDATE", "p", "s", "kept", "STEP", 1, "SGD", "LR", "0.5", "MOMENTUM", "0.9"); r.Int != 0 {
			t.Errorf("from %s step 1 is taken again", again)
		}
		master.Do("BGREWRITEAOF")
		for field(master, "aof_rewrite_in_progress")+field(master, "aof_rewrite_scheduled") > 0 {
			time.Sleep(10 * time.Millisecond) // Redis tells nobody
		}
	}
}

// busy has the server begin n means, of which some are under way when it
// returns. end waits for the answers.
func busy(t *testing.T, s *redistest.Server, n int) (end func() []error) {
	t.Helper()
	args := []any{"TENSOR.MEAN", "mean"}
	data := float32s(1_000_000, func(i int) float32 { return float32(i) })
	for i := range 16 {
		key := fmt.Sprint("x", i)
		s.Do("TENSOR.SET", key, "float32", 1, len(data)/4, data)
		args = append(args, key)
	}
	answers := make(chan error, n)
	for i := range n {
		conn, a := s.Dial(), slices.Clone(args)
		a[1] = fmt.Sprint("mean", i)
		go func() {
			_, err := conn.Do(context.Background(), a...)
			answers <- err
		}()
	}
	conn := s.Dial()
	for {
		r, err := conn.Do(context.Background(), "INFO", "spirt_tensors")
		if err != nil {
			t.Fatal(err)
		}
		if len(answers) == n {
			t.Fatal("the server is too fast for this test")
		}
		if !strings.Contains(string(r.Bytes), "spirt_queued:0\r") {
			break
		}
	}
	return func() []error {
		list := make([]error, n)
		for i := range list {
			list[i] = <-answers
		}
		return list
	}
}

// While clients are paused, as before a failover, nothing may change; Redis
// ends where a module passes on a write then. What was begun goes on after.
func TestPaused(t *testing.T) {
	s := redistest.WithModule(t, "--appendonly", "yes", "--appendfsync", "no")
	end := busy(t, s, 12)
	s.Do("CLIENT", "PAUSE", 500, "WRITE")
	size := s.Do("DBSIZE").Int
	for range 20 {
		if now := s.Do("DBSIZE").Int; now != size {
			t.Errorf("%d keys became %d in a pause", size, now)
		}
	}
	for _, err := range end() {
		if err != nil {
			t.Error(err)
		}
	}
	if size := s.Do("DBSIZE").Int; size != 16+12 {
		t.Errorf("%d keys after the pause", size)
	}
}

// A server that becomes a replica changes nothing of itself from then on.
func TestDemoted(t *testing.T) {
	s := redistest.WithModule(t)
	end := busy(t, s, 12)
	s.Do("REPLICAOF", "127.0.0.1", 1)
	size := s.Do("DBSIZE").Int
	end()                     // Redis answers that its clients do not wait any more
	s.Do("TENSOR.HASH", "x0") // comes after all of them
	if now := s.Do("DBSIZE").Int; now != size {
		t.Errorf("%d keys became %d on a replica", size, now)
	}
	if strings.Contains(s.Log(), "failed badly") {
		t.Error(s.Log())
	}
}
