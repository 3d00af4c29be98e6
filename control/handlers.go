package control

import (
	"encoding/json"
	"net/http"
	"slices"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/docs"
)

func getInfo(c *call) error {
	if err := c.noQuery(); err != nil {
		return err
	}
	info, err := c.server.cfg.Daemon.Info(c.Context())
	if err != nil {
		return err
	}
	if c.allow() != nil {
		shares, err := visibleShares(c)
		if err != nil {
			return err
		}
		info.Shares = len(shares)
	}
	return c.reply(http.StatusOK, info)
}

// visibleShares returns the shares there are for the caller, as the caller may see them; never nil.
func visibleShares(c *call) ([]api.Share, error) {
	all, err := c.server.cfg.Daemon.Shares(c.Context())
	if err != nil {
		return nil, err
	}
	out := make([]api.Share, 0, len(all))
	for _, s := range all {
		if c.allow().share(s.Tag) {
			out = append(out, c.allow().showShare(s))
		}
	}
	return out, nil
}

func listShares(c *call) error {
	if err := c.noQuery(); err != nil {
		return err
	}
	shares, err := visibleShares(c)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, shares)
}

func addShare(c *call) error {
	var spec api.ShareSpec
	if err := c.noQuery(); err != nil {
		return err
	}
	if err := c.decode(&spec); err != nil {
		return err
	}
	if err := api.CheckTag(spec.Tag); err != nil {
		return err
	}
	for _, g := range spec.Grafts {
		if err := api.CheckPath(g.Path); err != nil {
			return err
		}
	}
	share, err := c.server.cfg.Daemon.AddShare(c.Context(), spec)
	if err != nil {
		return err
	}
	return c.reply(http.StatusCreated, share)
}

func getShare(c *call) error {
	if err := c.noQuery(); err != nil {
		return err
	}
	shares, err := visibleShares(c)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(shares, func(s api.Share) bool { return s.Tag == c.tag })
	if i < 0 {
		return noShare(c.tag)
	}
	return c.reply(http.StatusOK, shares[i])
}

func removeShare(c *call) error {
	force, err := parseForce(c.URL.RawQuery)
	if err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	if err := c.server.cfg.Daemon.RemoveShare(c.Context(), c.tag, force); err != nil {
		return err
	}
	return c.done()
}

func listGrafts(c *call) error {
	if err := c.noQuery(); err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	grafts, err := c.server.cfg.Daemon.Grafts(c.Context(), c.tag)
	if err != nil {
		return err
	}
	out := make([]api.Graft, 0, len(grafts))
	for _, g := range grafts {
		out = append(out, c.allow().showGraft(g))
	}
	return c.reply(http.StatusOK, out)
}

func addGraft(c *call) error { return sendGraft(c, false, http.StatusCreated) }

func putGraft(c *call) error { return sendGraft(c, true, http.StatusOK) }

// sendGraft is addGraft and putGraft.
func sendGraft(c *call, replace bool, status int) error {
	var spec api.GraftSpec
	if err := c.noQuery(); err != nil {
		return err
	}
	if err := c.decode(&spec); err != nil {
		return err
	}
	if err := api.CheckPath(spec.Path); err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	graft, err := c.server.cfg.Daemon.AddGraft(c.Context(), c.tag, spec, replace)
	if err != nil {
		return err
	}
	return c.reply(status, c.allow().showGraft(graft))
}

func changeGraft(c *call) error {
	path, err := parseGraftPath(c.URL.RawQuery)
	if err != nil {
		return err
	}
	var change api.GraftChange
	if err := c.decode(&change); err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	graft, err := c.server.cfg.Daemon.ChangeGraft(c.Context(), c.tag, path, change)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, c.allow().showGraft(graft))
}

func removeGraft(c *call) error {
	path, err := parseGraftPath(c.URL.RawQuery)
	if err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	if err := c.server.cfg.Daemon.RemoveGraft(c.Context(), c.tag, path); err != nil {
		return err
	}
	return c.done()
}

func actGraft(c *call) error {
	q, err := parseQuery(c.URL.RawQuery, "action", "path")
	if err != nil {
		return err
	}
	path, action := q["path"], q["action"]
	if err := api.CheckPath(path); err != nil {
		return err
	}
	if action == "" {
		return api.Errorf(api.CodeInvalid, "parameter \"action\" is missing: expected what the graft is to do, as in ?path=/&action=checkpoint")
	}
	arg := json.RawMessage("{}")
	if len(c.body) > 0 {
		if err := c.decode(&arg); err != nil {
			return err
		}
	}
	if err := c.checkShare(); err != nil {
		return err
	}
	answer, err := c.server.cfg.Daemon.ActGraft(c.Context(), c.tag, path, action, arg)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, answer)
}

func getStats(c *call) error {
	if err := c.noQuery(); err != nil {
		return err
	}
	stats, err := c.server.cfg.Daemon.Stats(c.Context())
	if err != nil {
		return err
	}
	stats = c.allow().showStats(stats)
	if stats.Shares == nil {
		stats.Shares = []api.ShareStats{} // a list, in JSON, too
	}
	return c.reply(http.StatusOK, stats)
}

func getOpenAPI(c *call) error {
	return c.send(http.StatusOK, "application/yaml", docs.OpenAPI)
}
