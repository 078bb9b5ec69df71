package spirt

import (
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

const databaseToken = "a token of this test"

// serveDatabase serves an empty database by TCP until the test ends, and
// returns its URL.
func serveDatabase(t *testing.T) (*tensordb.DB, string) {
	t.Helper()
	db, err := tensordb.Open(tensordb.Config{})
	check(t, err)
	s := tensordb.NewServer(db, tensordb.ServerConfig{Tokens: []tensordb.Token{{Secret: databaseToken, Access: tensordb.All}}})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() { check(t, errors.Join(s.Close(), <-served, db.Close())) })
	return db, "redis://" + strings.ReplaceAll(databaseToken, " ", "%20") + "@" + ln.Addr().String()
}

// modelWith runs a peer of smallJob on a database, and returns the rounds it
// reported and its model.
func modelWith(t *testing.T, dir, url string) ([]uint64, string) {
	t.Helper()
	cfg := alone(dir)
	cfg.Database = url
	check(t, RunPeer(t.Context(), cfg))
	return roundsOf(eventsOf(t, dir), 1)
}

// Where the tensors lie makes no difference to the model.
func TestRemoteDatabase(t *testing.T) {
	_, want := modelWith(t, runOf(t, smallJob(9)), "")
	db, url := serveDatabase(t)
	rounds, got := modelWith(t, runOf(t, smallJob(9)), url)
	if got != want || len(rounds) != 9 {
		t.Errorf("%d rounds end with the model %s, in the peer's own database with %s", len(rounds), got, want)
	}
	if s := db.Stats(); s.Keys == 0 || s.Accumulators != 0 {
		t.Errorf("the database holds %+v", s)
	}
	for _, key := range db.Keys("") {
		if !strings.HasPrefix(key, "{") || !strings.Contains(key, ":1}:") {
			t.Errorf("key %q is not of the peer", key)
		}
	}
}

// A peer that was interrupted goes on with a database that has lost
// everything: its checkpoints are its own.
func TestRemoteDatabaseLost(t *testing.T) {
	_, want := modelWith(t, runOf(t, smallJob(12)), "")
	dir := runOf(t, smallJob(12))
	_, url := serveDatabase(t)
	cfg := alone(dir)
	cfg.Database = url
	runUntil(t, cfg, 3)
	_, other := serveDatabase(t)
	if _, got := modelWith(t, dir, other); got != want {
		t.Errorf("the model is %s, undisturbed it is %s", got, want)
	}
}

func TestRemoteDatabaseRefused(t *testing.T) {
	_, url := serveDatabase(t)
	for wrong, says := range map[string]string{
		"http://x":            "redis://",
		"redis://127.0.0.1:1": "connect",
		strings.Replace(url, "test@", "tset@", 1): "WRONGPASS",
	} {
		cfg := alone(runOf(t, smallJob(1)))
		cfg.Database = wrong
		err := RunPeer(t.Context(), cfg)
		refused(t, err, says)
		if strings.Contains(err.Error(), "tset") || strings.Contains(err.Error(), "a%20token") {
			t.Errorf("the error %q tells the token", err)
		}
	}
	_, err := Train(t.Context(), Job{Peers: 3}, TrainConfig{Dir: t.TempDir() + "/run", Databases: []string{url, url}})
	refused(t, err, "2 databases for 3 peers")
}

// Nor does it whether functions or the database compute, here and in another
// process.
func TestFunctionsInDatabase(t *testing.T) {
	job := smallJob(9)
	_, want := modelWith(t, runOf(t, job), "")
	job.Functions.Kind = functionsDatabase
	_, url := serveDatabase(t)
	for where, url := range map[string]string{"its own process": "", "another process": url} {
		dir := runOf(t, job)
		rounds, got := modelWith(t, dir, url)
		if got != want || len(rounds) != 9 {
			t.Errorf("in %s: %d rounds end with the model %s, with functions with %s", where, len(rounds), got, want)
		}
		validations := 0
		for _, e := range eventsOf(t, dir) {
			if e.Event == "validation" {
				validations++
			}
			if e.Event == "round" && e.Used.Invocations != 0 {
				t.Errorf("in %s: %+v", where, *e.Used)
			}
		}
		if validations != 2 {
			t.Errorf("in %s: %d validations", where, validations)
		}
	}
}

// A peer that is killed goes on from its last head, not from its checkpoint,
// where its database lived on; not where what lies there is something else.
func TestRemoteDatabaseKeepsHead(t *testing.T) {
	job := smallJob(9)
	job.ValidateEvery = 1 // no head is in the middle of a validation, no checkpoint waits for one
	_, want := modelWith(t, runOf(t, job), "")
	for name, spoil := range map[string]bool{"kept": false, "spoilt": true} {
		dir := runOf(t, job)
		db, url := serveDatabase(t)
		check(t, settings{Listen: "127.0.0.1:0", Database: url}.write(peerDir(dir, 1)))
		if !runKilled(t, dir, 1, stepAdopt, 6) {
			t.Fatal("not killed")
		}
		from := uint64(6)
		if spoil {
			from = 4 // the checkpoint
			for _, key := range db.Keys("") {
				if strings.Contains(key, "state/6/parameters") {
					ref, err := db.Get(key)
					check(t, err)
					bad := tensor.Tensor{DType: tensor.Float32, Shape: ref.Tensor().Shape, Data: make([]byte, len(ref.Tensor().Data))}
					ref.Release()
					_, err = db.Set(key, bad)
					check(t, err)
				}
			}
		}
		if runKilled(t, dir, 1, "", 0) {
			t.Fatal("killed again")
		}
		all := eventsOf(t, dir)
		if _, got := roundsOf(all, 1); got != want {
			t.Errorf("%s: the model is %s, undisturbed it is %s", name, got, want)
		}
		for _, e := range all {
			if e.Event == "resume" && e.Round != from {
				t.Errorf("%s: it goes on from round %d, want %d: %s", name, e.Round, from, e.Message)
			}
		}
	}
}
