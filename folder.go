package spirt

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Names in a run folder; docs/run-folder.md describes them.
const (
	jobFile     = "job.yaml"
	genesisFile = "genesis"
	rostersDir  = "rosters"
	adminFile   = "admin.key"
	eventsFile  = "events.jsonl"
	modelFile   = "model.safetensors"
	recordFile  = "run.json"
	pricesFile  = "prices.yaml"
	peersDir    = "peers"
	curvesFile  = "curves" // .svg and .png
	invitesFile = "invites.json"

	// in peers/<n>
	keyFile       = "key"
	nextKeyFile   = "key.next" // is to replace it
	oldKeyFile    = "key.old"  // was replaced
	settingsFile  = "peer.yaml"
	addressesFile = "addresses.yaml"
	newPeerDir    = "new" // of one that has no index yet
	lockFileName  = "lock"
	addressFile   = "address"
	logFile       = "log"
	watermarkFile = "watermark"
	journalFile   = "journal"
	socketFile    = "db.sock"
	databaseDir   = "database"
)

// peerDir returns the folder of peer n, 1 to the number of peers.
func peerDir(run string, n int) string {
	return filepath.Join(run, peersDir, strconv.Itoa(n))
}

func dirOf(path string) string { return filepath.Dir(path) }

// absoluteData returns the name of a data set with a folder that means the
// same wherever a peer is started again. A shell leaves the ~ in idx:~/x.
func absoluteData(name string) string {
	folder, ok := strings.CutPrefix(name, "idx:")
	if !ok || folder == "" {
		return name
	}
	if rest, ok := strings.CutPrefix(folder, "~/"); ok {
		if home, err := os.UserHomeDir(); err == nil {
			folder = filepath.Join(home, rest)
		}
	}
	if abs, err := filepath.Abs(folder); err == nil {
		folder = abs
	}
	return "idx:" + folder
}
