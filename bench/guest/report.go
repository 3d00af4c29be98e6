package main

import (
	"encoding/json"
	"os"
	"path/filepath"
)

func write(cfg config, list []workload, samples, counts []sample) error {
	if err := os.MkdirAll(cfg.out, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(map[string]any{"samples": samples, "counts": counts}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(cfg.out, "results.json"), b, 0o644)
}
