package spirt

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/pbnjay/memory"

	"github.com/spirt-ml/spirt/chart"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/treehash"
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

	// What it takes to repeat the run: absent in runs of older versions.
	JobID    string    `json:"job_id,omitempty"`    // hash of the genesis
	DataHash string    `json:"data_hash,omitempty"` // of the samples, whatever their folder is called
	Hardware *Hardware `json:"hardware,omitempty"`
}

// Hardware is what a run ran on. What the system does not tell is empty.
type Hardware struct {
	CPU      string `json:"cpu,omitempty"`
	Cores    int    `json:"cores"` // that this process may use
	MemoryMB int64  `json:"memory_mb,omitempty"`
	OS       string `json:"os,omitempty"`
	Kernel   string `json:"kernel,omitempty"`
}

// ThisHardware returns that of this machine.
func ThisHardware() Hardware {
	cpu, system, kernel := machine()
	return Hardware{CPU: cpu, Cores: runtime.NumCPU(), MemoryMB: int64(memory.TotalMemory() >> 20), OS: system, Kernel: kernel}
}

// describe adds to the record of a run what it can be repeated with. Where
// the run was recorded before, that stays.
func (r *run) describe(info RunInfo) RunInfo {
	if before, err := ReadRun(r.dir); err == nil && before.DataHash != "" {
		info.JobID, info.DataHash, info.Hardware = before.JobID, before.DataHash, before.Hardware
		return info
	}
	if b, err := readFile(filepath.Join(r.dir, genesisFile), maxRunInfo); err == nil {
		if g, err := membership.DecodeGenesis(b); err == nil {
			info.JobID = g.ID().String()
		}
	}
	images, labels := treehash.Sum(r.data.Images), treehash.Sum(r.data.Labels)
	info.DataHash = treehash.Sum(slices.Concat(images[:], labels[:], []byte(fmt.Sprint(r.data.Shape)))).String()
	h := ThisHardware()
	info.Hardware = &h
	return info
}

// ViewOf returns what the events of a run folder tell by now.
func ViewOf(dir string) (*events.View, error) {
	tail, err := EventsOf(dir)
	if err != nil {
		return nil, err
	}
	defer tail.Close()
	var v events.View
	return &v, tail.Each(v.Add)
}

// WriteCurves draws the learning curves of a run as curves.svg and curves.png
// in its folder, however the run ended.
func WriteCurves(dir string) error {
	info, err := ReadRun(dir)
	if err != nil {
		return err
	}
	v, err := ViewOf(dir)
	if err != nil {
		return err
	}
	c := chart.Curves(filepath.Base(info.Job.Model)+" on "+filepath.Base(info.Job.Data), headline(info, v), v)
	return errors.Join(chart.WriteFile(filepath.Join(dir, curvesFile+".svg"), c), chart.WriteFile(filepath.Join(dir, curvesFile+".png"), c))
}

// headline is how a run ended, in a line.
func headline(info RunInfo, v *events.View) string {
	parts := []string{fmt.Sprintf("%d peers", info.Job.Peers), fmt.Sprintf("%d rounds", v.Round)}
	if d := v.Done; d != nil {
		if d.Accuracy != nil {
			parts = append(parts, fmt.Sprintf("accuracy %.2f %% on the test samples", 100**d.Accuracy))
		} else {
			parts = append(parts, d.StopReason)
		}
	}
	parts = append(parts, fmt.Sprintf("%.1f s", v.Elapsed().Seconds()))
	if v.Spent > 0 {
		parts = append(parts, v.Spent.String())
	}
	return strings.Join(parts, " · ")
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
