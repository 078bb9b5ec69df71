package spirt

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// Names in a run folder; docs/run-folder.md describes them.
const (
	jobFile    = "job.yaml"
	rosterFile = "roster.yaml"
	eventsFile = "events.jsonl"
	modelFile  = "model.safetensors"
	recordFile = "run.json"
	peersDir   = "peers"

	// in peers/<n>
	keyFile       = "key"
	lockFileName  = "lock"
	addressFile   = "address"
	logFile       = "log"
	watermarkFile = "watermark"
	socketFile    = "db.sock"
	databaseDir   = "database"
)

// peerDir returns the folder of peer n, 1 to the number of peers.
func peerDir(run string, n int) string {
	return filepath.Join(run, peersDir, strconv.Itoa(n))
}

func dirOf(path string) string { return filepath.Dir(path) }

// checkPeer returns an error unless n names one of a job's peers.
func checkPeer(n, peers int) error {
	if n < 1 || n > peers {
		return fmt.Errorf("peer %d: the job has the peers 1 to %d", n, peers)
	}
	return nil
}
