package spirt

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spirt-ml/spirt/events"
)

// RunInfo is run.json: what ran, on what, and how it ended.
type RunInfo struct {
	State    string    `json:"state"` // running, done, failed or interrupted
	Version  string    `json:"version"`
	Go       string    `json:"go"`
	Platform string    `json:"platform"`
	CPUs     int       `json:"cpus"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Job      Job       `json:"job"`
	Done     *Event    `json:"done,omitempty"`
}

const maxRunInfo = 1 << 20 // bytes

// ReadRun reads run.json of a run folder.
func ReadRun(dir string) (RunInfo, error) {
	b, err := readFile(filepath.Join(dir, recordFile), maxRunInfo)
	if err != nil {
		return RunInfo{}, err
	}
	var info RunInfo
	if err := json.Unmarshal(b, &info); err != nil {
		return RunInfo{}, fmt.Errorf("%s: %w", filepath.Join(dir, recordFile), err)
	}
	return info, nil
}

// EventsOf opens the events of a run folder from the first on.
func EventsOf(dir string) (*events.Tail, error) {
	return events.OpenTail(filepath.Join(dir, eventsFile))
}
